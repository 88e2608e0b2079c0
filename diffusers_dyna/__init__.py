# SPDX-License-Identifier: Apache-2.0
"""Flow-matching schedulers, a U-Net and dynamic diffusion transformers for Hugging Face diffusers."""

import importlib
import importlib.util

import diffusers
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401  diffusers reads these off this module when it loads
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging

from .models import DYNA_DIT_CONFIGS, DynaDiTTransformer2DModel, DynaUNet2DModel
from .pipelines import (
    DynaDiTImg2ImgPipeline,
    DynaDiTInpaintPipeline,
    DynaDiTPipeline,
    DynaDiTTextToImagePipeline,
    DynaDiTUpscalePipeline,
    DynaUNetPipeline,
)
from .schedulers import (
    FlowMatchODEScheduler,
    FlowMatchPath,
    FlowMatchSDEScheduler,
    flow_log_likelihood,
    integrate_flow,
)


__version__ = "0.1.0.dev0"
__all__ = [
    "DYNA_DIT_CONFIGS",
    "DynaDiTImg2ImgPipeline",
    "DynaDiTInpaintPipeline",
    "DynaDiTPipeline",
    "DynaDiTTextToImagePipeline",
    "DynaDiTTransformer2DModel",
    "DynaDiTUpscalePipeline",
    "DynaUNet2DModel",
    "DynaUNetPipeline",
    "FlowMatchODEScheduler",
    "FlowMatchPath",
    "FlowMatchSDEScheduler",
    "flow_log_likelihood",
    "integrate_flow",
]


def __getattr__(name: str):
    if name == "hub":  # read when it is asked for: drawing images does not need it
        return importlib.import_module(f"{__name__}.hub")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_with_diffusers() -> None:
    """
    Lets diffusers load what this package saved: components recorded as `["diffusers_dyna", <class>]`, and pipelines,
    which are recorded by their class name alone (huggingface/diffusers#6563).
    """
    LOADABLE_CLASSES.setdefault(__name__, {})
    for name in __all__:
        if isinstance(globals()[name], type) and not hasattr(diffusers, name):
            setattr(diffusers, name, globals()[name])


def _register_with_cache_dit() -> None:
    """Lets `cache_dit.enable_cache` find the blocks of the dynamic transformer, where cache-dit is installed."""
    if importlib.util.find_spec("cache_dit") is None:
        return
    try:
        from cache_dit import BlockAdapter, ForwardPattern
        from cache_dit.caching.block_adapters import BlockAdapterRegister
    except Exception as error:  # an optional package that is broken must not break this one
        logging.get_logger(__name__).warning(f"cache-dit is installed, but cannot be used: {error}")
        return

    @BlockAdapterRegister.register("DynaDiT")
    def adapt(pipe, **kwargs) -> BlockAdapter:
        blocks = pipe.transformer.transformer_blocks
        pattern = ForwardPattern.Pattern_3  # one tensor in, one tensor out
        return BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=blocks, forward_pattern=pattern, **kwargs)


_register_with_diffusers()
_register_with_cache_dit()
