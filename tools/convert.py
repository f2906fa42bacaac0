"""Convert the weights that a paper's authors released: `linsight convert FILE --model NAME`."""

from pathlib import Path
from typing import Annotated

import safetensors.torch
import typer

from linsight.backbones.checkpoint import CheckpointError
from linsight.heads.checkpoint import AtomicLocalBackend
from linsight.tools.model import loading_statement, open_model
from linsight.tools.run import report_errors


def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint as its authors released it.")],
    model: Annotated[
        str, typer.Option(metavar="NAME[.TAG]", help="The model that it is of: linsight models.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A .safetensors file; default: the model's name, beside FILE."),
    ] = None,
) -> None:
    """Write a paper's released weights as safetensors under linsight's names."""
    with report_errors():
        if not file.exists():
            raise FileNotFoundError(f"FILE {file} does not exist")
        out = out or file.with_name(f"{model}.safetensors")
        if out.suffix != ".safetensors":
            raise CheckpointError(f"--out is {out}, expected a name that ends in .safetensors")
        if out.exists() and out.samefile(file):
            raise CheckpointError(f"{out} is the file to convert itself: name another with --out")
        opened = open_model(file, model)
        architecture = model.split(".")[0]
        if opened.pretrained_cfg["architecture"] != architecture:
            raise CheckpointError(
                f"{file} is of {opened.pretrained_cfg['architecture']}, not of {architecture}"
            )
        parameters = sum(p.numel() for p in opened.parameters())
        print(f"Read {file}: {_megabytes(file)}, fits {architecture} ({parameters:,} parameters)")
        weights = {name: value.contiguous() for name, value in opened.state_dict().items()}
        content = safetensors.torch.save(weights, {"format": "pt", "architecture": architecture})
        AtomicLocalBackend().put(content, out)
        print(f"Wrote {out}: {_megabytes(out)}, {len(weights)} tensors")
        print(f"Load it with {loading_statement(model, out, opened.num_classes)}")


def _megabytes(file: Path) -> str:
    files = file.iterdir() if file.is_dir() else [file]
    return f"{sum(part.stat().st_size for part in files) / 1e6:.1f} MB"
