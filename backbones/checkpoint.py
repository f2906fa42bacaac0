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
    """Raise unless `state_dict` has the tensors of `model`, its classifier and counters aside.

    Raises:
        ValueError: with how many tensors are missing, too many or of another shape, and one each.
    """
    classifier = (
        model.pretrained_cfg["classifier"] if hasattr(model, "pretrained_cfg") else "head.fc"
    )
    wanted = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.startswith(f"{classifier}.") and not name.endswith("num_batches_tracked")
    }
    got = {
        name: tuple(value.shape)
        for name, value in state_dict.items()
        if not name.startswith(f"{classifier}.") and not name.endswith("num_batches_tracked")
    }
    faults = []
    if missing := [name for name in wanted if name not in got]:
        faults.append(f"{len(missing)} of {len(wanted)} tensors missing ({missing[0]}, ...)")
    if unexpected := [name for name in got if name not in wanted]:
        faults.append(f"{len(unexpected)} unknown ({unexpected[0]}, ...)")
    if reshaped := [name for name in wanted if name in got and got[name] != wanted[name]]:
        name = reshaped[0]
        faults.append(
            f"{len(reshaped)} of another shape ({name} is {got[name]}, expected {wanted[name]})"
        )
    if faults:
        raise ValueError(
            f"this checkpoint is not of the model {type(model).__name__} that it is loaded into: "
            + "; ".join(faults)
        )
