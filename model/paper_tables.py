"""The costs that VideoChat-Flash (arXiv 2501.00574) prints in its tables 1, 5 and 7, as printed.

T and G are 10^12 and 10^9. The scores of the same tables are left out.
"""

from typing import NamedTuple


class Table1(NamedTuple):
    """One line. Tokens per frame are not printed: those that its figures follow from, see
    `hico_kernels.flops.cost`.
    """

    frames: int
    model: str
    tokens_per_frame: int
    teraflops: str
    train_gigabytes: str  # or "oom"
    infer_gigabytes: str


# "Comparison of FLOPs and Cuda memory. FLOPs and memory are estimated by the context length of the
# input LLM". LongVILA is arXiv 2408.10188, LongVA arXiv 2406.16852.
TABLE1 = (
    Table1(64, "LongVILA", 196, "455.1", "56.7", "18.1"),
    Table1(64, "LongVA", 144, "316.8", "50.6", "17.4"),
    Table1(64, "VideoChat-Flash", 14, "29.6", "35.2", "15.5"),
    Table1(256, "LongVILA", 196, "2946.3", "oom", "26.8"),
    Table1(256, "LongVA", 144, "1870.1", "oom", "23.7"),
    Table1(256, "VideoChat-Flash", 14, "113.3", "40.2", "16.1"),
    Table1(1000, "LongVILA", 196, "28707.7", "oom", "79.7"),
    Table1(1000, "LongVA", 144, "16583.7", "oom", "48.3"),
    Table1(1000, "VideoChat-Flash", 14, "519.7", "59.4", "18.5"),
    Table1(10000, "LongVILA", 196, "2368810.0", "oom", "oom"),
    Table1(10000, "LongVA", 144, "1289490.0", "oom", "oom"),
    Table1(10000, "VideoChat-Flash", 14, "15786.0", "oom", "47.4"),
)


class Table5(NamedTuple):
    """One encoder; its line is printed four times, with four compressors."""

    encoder: str
    gigaflops: str  # multiply-adds, see `hico_kernels.flops`
    milliseconds: str


# "Comparison of visual encoders."
TABLE5 = (Table5("UMT-L@224", "596", "11.8"), Table5("SigLIP SO400M@384", "2679", "79.7"))


class Table7(NamedTuple):
    """One line: layer -> (rule as printed, share of the visual tokens that stays)."""

    drops: dict[int, tuple[str, float]]
    teraflops: str  # printed under "FLOPs (G)"; seconds and hardware say T
    seconds: str


# "Effectiveness of the visual dropout."
TABLE7 = (
    Table7({}, "341.4", "2.6"),
    Table7({4: ("uniform", 0.5)}, "242.8", "1.9"),
    Table7({4: ("attention", 0.5)}, "242.8", "1.9"),
    Table7({18: ("uniform", 0.5)}, "295.2", "2.2"),
    Table7({18: ("attention", 0.5)}, "295.2", "2.2"),
    Table7({4: ("attention", 0.75), 18: ("attention", 0.25)}, "245.8", "1.9"),
    Table7({4: ("uniform", 0.75), 18: ("attention", 0.25)}, "245.8", "1.9"),
)
