"""The command `hico`: a demo on a shipped video, a question about one's own, the cost tables."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hico_kernels import DropPlan, TextTopK, Uniform
from hico_kernels.flops import CONVENTIONS
from hico_model import page, presets, report
from hico_model.errors import UserError

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
RULES = {"uniform": Uniform, "text": TextTopK}
DROP_EXAMPLE = "4:uniform:0.75,18:text:0.25"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hico` with `argv` (None: those of the process). Gives the exit code: 2 for bad input."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" for some signs
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except UserError as e:
        print(f"hico: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


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
    ask.add_argument("--frames", metavar="N", type=int, help="look at no more than N frames")
    ask.add_argument(
        "--drop",
        metavar="PLAN",
        help="LAYER:RULE:KEEP,... with RULE uniform or text and KEEP the share of the visual "
        f"tokens that stays, or none (default: the model's own, as {DROP_EXAMPLE})",
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
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise UserError(f"--html: {Path(args.html).parent} is no folder: create it first")
    plan = None if args.drop is None else parse_drop(args.drop)
    print(f"hico ask: {args.video} ...", flush=True)
    from hico_model.model import VideoChatFlash, read_config
    from hico_model.video import probe

    probe(args.video)  # before the weights: these may take minutes
    if args.preset or not args.model:
        config = presets[args.preset or "nano"]
    else:
        config = read_config(args.model)
    if plan is not None:
        try:
            plan.check_layers(config.num_layers)
        except ValueError as e:
            raise UserError(_drop_message(e)) from e
    if args.model:
        model = VideoChatFlash.from_pretrained(args.model, config)
    else:
        model = VideoChatFlash(config)
    _answer(
        model,
        args.video,
        args.question,
        plan=plan,
        frames=args.frames,
        html=args.html,
        max_new_tokens=args.max_new_tokens,
    )


def parse_drop(text: str) -> DropPlan:
    """The plan that --drop says. Raises UserError with what is wrong with it."""
    drops = {}
    for part in text.split(",") if text != "none" else ():
        fields = part.split(":")
        try:
            layer, rule, keep = int(fields[0]), RULES[fields[1]], float(fields[2])
        except (ValueError, KeyError, IndexError):
            fields = []
        if len(fields) != 3:
            raise UserError(
                f"--drop: {part!r} is not LAYER:RULE:KEEP with RULE uniform or text, "
                f"as in {DROP_EXAMPLE}"
            )
        if not 0 < keep <= 1:
            raise UserError(f"--drop: {part!r} must keep a share above 0 and up to 1, got {keep:g}")
        if layer in drops:
            raise UserError(f"--drop: layer {layer} is there twice, name every layer once")
        drops[layer] = rule(keep=keep)
    try:
        return DropPlan(drops, positions="renumber")
    except ValueError as e:
        raise UserError(_drop_message(e)) from e


def _drop_message(e: ValueError) -> str:
    return f"--drop: {str(e).removeprefix('drops: ')}"


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
    html: str | None = None,
    max_new_tokens: int,
    credit: str = "",
) -> None:
    """Answer, print the report and write the page."""
    from hico_model import answer

    plan = model.config.plan if plan is None else plan
    result = answer(
        video, question, model, max_frames=frames, plan=plan, max_new_tokens=max_new_tokens
    )
    run = report.Run(
        answer=result,
        question=question,
        video=Path(video).name,
        config=model.config,
        plan=plan,
        weights=model.weights,
        trained=not model.weights.startswith("random weights"),
        value_bytes=model.dtype.itemsize,
        credit=credit,
    )
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\n{report.text(run, colour=colour)}")
    if html:
        try:
            size = Path(html).write_text(page.render(run), encoding="utf-8")
        except OSError as e:
            raise UserError(f"{html} cannot be written: {e.strerror}") from e
        print(f"\nwrote {html} ({size / 1e6:.1f} MB): open it in a browser")
