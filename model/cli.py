"""The command `hico`: a demo on a shipped video, a question about one's own, the cost tables.

What the extras bring (numpy, pillow, transformers, ...) is imported inside the commands: --help
works without, and the commands can say what is missing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hico_kernels import DropPlan
from hico_kernels.flops import CONVENTIONS
from hico_model import arguments, presets
from hico_model.config import SAMPLINGS
from hico_model.errors import UserError, shown

if TYPE_CHECKING:
    from hico_model import VideoChatFlash

DEMO_VIDEO = Path(__file__).with_name("data") / "big_buck_bunny.mp4"
DEMO_QUESTION = "What is the big rabbit doing?"
DEMO_TOKENS = 16
DEMO_PAGE = "hico_demo.html"
DEMO_CREDIT = (
    "Video: Big Buck Bunny, (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, "
    "CC BY 3.0; scaled down, without sound"
)
FORMATS = ("text", "md", "csv", "json")  # of `hico tables`
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13  # as a shell numbers the ends by these signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hico` with `argv` (None: those of the process). Gives the exit code: 2 for bad input."""
    _ready_streams()
    try:
        try:
            args = _parser().parse_args(argv)
            args.run(args)
        finally:
            sys.stdout.flush()  # here, where an error is caught
    except UserError as e:
        return _refuse(str(e))
    except ModuleNotFoundError as e:
        missing = (e.name or str(e)).partition(".")[0]
        if missing.startswith("hico_"):
            raise
        return _refuse(f'{missing} is missing: pip install ".[model,video]" in the repository')
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        if isinstance(e, BrokenPipeError):  # whoever read has gone, as `head` does
            return BROKEN_PIPE
        return _refuse(str(e))
    return 0


def _ready_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as `hico ... >&-` does
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" for signs


def _refuse(message: str) -> int:
    print(f"hico: {shown(' '.join(message.split()))}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("hico", description="Ask about a video whose tokens are merged and dropped.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help=f"a shipped video; also writes {DEMO_PAGE}")
    demo.set_defaults(run=_demo)

    ask = commands.add_parser("ask", help="your own video")
    ask.set_defaults(run=_ask)
    ask.add_argument("video", metavar="VIDEO", help="path of a video file")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument(
        "--model", metavar="DIR", help="folder of a checkpoint (default: random weights)"
    )
    ask.add_argument(
        "--preset", metavar="NAME", help=f"one of {', '.join(presets)} (default: nano)"
    )
    ask.add_argument("--device", metavar="NAME", help="as cpu or cuda:1 (default: a GPU, or cpu)")
    ask.add_argument("--frames", metavar="N", type=int, help="look at no more than N frames")
    ask.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        default=SAMPLINGS[0],
        help="how many frames: 1 a second as released, as in the paper, or 15 a second "
        "(default: %(default)s)",
    )
    ask.add_argument(
        "--drop",
        metavar="PLAN",
        help="LAYER:RULE:KEEP,... with RULE uniform or text and KEEP the share of the visual "
        f"tokens that stays, or none (default: the model's own, as {arguments.DROP_EXAMPLE})",
    )
    ask.add_argument("--html", metavar="FILE", help="also write a page that shows what happened")
    ask.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="default: 64")

    tables = commands.add_parser("tables", help="the papers' cost tables, computed again")
    tables.set_defaults(run=_tables)
    tables.add_argument("--table", type=int, choices=(1, 5, 7), help="default: all three")
    tables.add_argument(
        "--convention", choices=CONVENTIONS, help="how FLOPs are counted (default: as the table's)"
    )
    tables.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    return parser


def _demo(args: argparse.Namespace) -> None:
    print(f"hico demo: 60 s of {DEMO_VIDEO.name} through nano, a small model ...", flush=True)
    arguments.check_output(DEMO_PAGE, str(DEMO_VIDEO))
    from hico_model import VideoChatFlash  # seconds, so the line above comes first

    model = VideoChatFlash(presets["nano"])
    _answer(
        model,
        str(DEMO_VIDEO),
        DEMO_QUESTION,
        html=DEMO_PAGE,
        max_new_tokens=DEMO_TOKENS,
        credit=DEMO_CREDIT,
    )


def _ask(args: argparse.Namespace) -> None:
    if args.frames is not None and args.frames < 4:
        raise UserError(f"--frames must be at least 4 (one clip), got {args.frames}")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.preset is not None and args.preset not in presets:
        raise UserError(f"no preset {args.preset!r}: choose one of {', '.join(presets)}")
    video = arguments.path(args.video, "VIDEO")
    folder = None if args.model is None else arguments.path(args.model, "--model")
    html = None if args.html is None else arguments.path(args.html, "--html")
    if html is not None:
        arguments.check_output(html, video)
    plan = None if args.drop is None else arguments.parse_drop(args.drop)
    device = arguments.find_device(args.device)
    print(f"hico ask: {shown(video)} ...", flush=True)
    from hico_model.prompt import check_question
    from hico_model.video import probe

    check_question(args.question)
    probe(video)  # before the weights: these may take minutes
    from hico_model.model import VideoChatFlash, read_config

    if args.preset or folder is None:
        config = presets[args.preset or "nano"]
    else:
        config = read_config(folder)
    if plan is not None:
        arguments.check_layers(plan, config)
    if folder is None:
        arguments.check_memory(config, device)
        model = VideoChatFlash(config, device=device)
    else:
        model = VideoChatFlash.from_pretrained(folder, config, device=device)
    _answer(
        model,
        video,
        args.question,
        plan=plan,
        frames=args.frames,
        sampling=args.sampling,
        html=html,
        max_new_tokens=args.max_new_tokens,
    )


def _tables(args: argparse.Namespace) -> None:
    if args.table == 5 and args.convention:
        raise UserError("--convention is for tables 1 and 7: nothing in an encoder is causal")
    from hico_model.table_formats import render
    from hico_model.tables import tables  # transformers: seconds

    print(render(tables([args.table] if args.table else (1, 5, 7), args.convention), args.format))


def _answer(
    model: "VideoChatFlash",
    video: str,
    question: str,
    *,
    plan: DropPlan | None = None,
    frames: int | None = None,
    sampling: str = SAMPLINGS[0],
    html: str | None = None,
    max_new_tokens: int,
    credit: str = "",
) -> None:
    """Answer, print the report and write the page."""
    from hico_model import answer, page, report

    plan = model.config.plan if plan is None else plan
    result = answer(
        video,
        question,
        model,
        max_frames=frames,
        sampling=sampling,
        plan=plan,
        max_new_tokens=max_new_tokens,
    )
    run = report.Run(
        answer=result,
        question=question,
        video=Path(video).name,
        config=model.config,
        plan=plan,
        weights=model.weights,
        trained=model.trained,
        value_bytes=model.dtype.itemsize,
        credit=credit,
    )
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\n{shown(report.text(run, colour=colour))}")
    if html is not None:
        try:
            size = Path(html).write_text(page.render(run), encoding="utf-8")
        except OSError as e:
            raise UserError(f"{html} cannot be written: {e.strerror}") from e
        print(f"\nwrote {shown(html)} ({size / 1e6:.1f} MB): open it in a browser")
