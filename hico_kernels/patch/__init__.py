"""Drop-in token dropping: the plans. What applies them to other people's models lives here too."""

from hico_kernels.patch.plan import DropPlan, TextTopK, Uniform

__all__ = ["DropPlan", "TextTopK", "Uniform"]
