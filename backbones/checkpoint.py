"""What the checkpoint filters of all families share."""

from typing import Any

from torch import Tensor, nn

# Training scripts wrap the weights with their optimiser and arguments; timm's order of choice.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, its averaged weights first, or itself."""
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint


def check_fits(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Raise unless `state_dict` has the tensors of `model`.

    The classifier and the channels of the first convolution are left to timm, which adapts them.

    Raises:
        ValueError: with how many tensors are missing, unknown or of another shape, and one each.
    """
    config = model.pretrained_cfg
    adapted = (f"{config['classifier']}.", f"{config['first_conv']}.")
    wanted, got = (
        {
            name: tuple(value.shape)
            for name, value in tensors.items()
            if not name.startswith(adapted) and not name.endswith("num_batches_tracked")
        }
        for tensors in (model.state_dict(), state_dict)
    )
    faults = []
    if missing := [name for name in wanted if name not in got]:
        faults.append(f"{len(missing)} of its {len(wanted)} tensors missing ({missing[0]}, ...)")
    if unknown := [name for name in got if name not in wanted]:
        faults.append(f"{len(unknown)} unknown ({unknown[0]}, ...)")
    if reshaped := [name for name in wanted if got.get(name, wanted[name]) != wanted[name]]:
        name = reshaped[0]
        faults.append(
            f"{len(reshaped)} of another shape ({name} is {got[name]}, expected {wanted[name]})"
        )
    if faults:
        raise ValueError(
            f"the checkpoint is not of {config.get('architecture', type(model).__name__)}: "
            + "; ".join(faults)
        )
