# SPDX-License-Identifier: Apache-2.0
from .pipeline_dyna_dit import DynaDiTPipeline
from .pipeline_dyna_dit_base import DynaDiTPipelineOutput
from .pipeline_dyna_dit_img2img import DynaDiTImg2ImgPipeline
from .pipeline_dyna_dit_inpaint import DynaDiTInpaintPipeline
from .pipeline_dyna_dit_text_to_image import DynaDiTTextToImagePipeline
from .pipeline_dyna_dit_upscale import DynaDiTUpscalePipeline
from .pipeline_dyna_unet import DynaUNetPipeline


__all__ = [
    "DynaDiTImg2ImgPipeline",
    "DynaDiTInpaintPipeline",
    "DynaDiTPipeline",
    "DynaDiTPipelineOutput",
    "DynaDiTTextToImagePipeline",
    "DynaDiTUpscalePipeline",
    "DynaUNetPipeline",
]
