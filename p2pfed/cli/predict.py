"""predict: what a model says of new cases of this hospital, as files.

The model is the common one, the one that was tuned here, or a file; the cases are read and the
results written by the private plane (`private_plane`).
"""

from __future__ import annotations

import contextlib

from p2pfed.cli.model import common_model
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.private_plane import ask, place
from p2pfed.cli.text import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

__all__ = ["predict"]


def predict(parser: ArgumentParser) -> None:
    """Fill in the command `predict`."""
    describe(
        parser,
        "Apply a model to new cases. An imaging task takes NIfTI files, folders of DICOM series\n"
        "and folders of cases, and writes each mask as CASE.nii.gz on the grid of its image.\n"
        "For research: no result of it is a finding.",
        endpoint="GET /v1/model, with --model common",
    )
    parser.add_argument(
        "--model",
        default="common",
        metavar="FILE|common|tuned",
        help="a file of p2pfed model fetch, export or tune; or common, as the daemon has it (the"
        " default); or tuned, the one tuned here last",
    )
    parser.add_argument(
        "--in",
        dest="sources",
        metavar="PATH",
        action="append",
        required=True,
        help="a file or folder of one or several cases; may be given again",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="made 0700; must not exist")
    parser.add_argument("--task", help="without a configuration: as installed here")
    with_socket(parser)
    parser.set_defaults(run=_predict)


def _predict(args: Namespace) -> None:
    flags = [*place(args), "--out", args.out]
    for source in args.sources:
        flags += ["--in", source]
    named = contextlib.nullcontext(args.model)
    with common_model(args, None) if args.model == "common" else named as model:
        data = ask("predict", [*flags, "--model", model])
    count = len(data["files"])
    emit(args, "predict", data, [f"{count} file{'s' * (count != 1)}: {args.out}"])
