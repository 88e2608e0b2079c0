# SPDX-License-Identifier: Apache-2.0
from .pipeline_dyna_dit import DynaDiTPipeline, DynaDiTPipelineOutput
from .pipeline_dyna_unet import DynaUNetPipeline


__all__ = ["DynaDiTPipeline", "DynaDiTPipelineOutput", "DynaUNetPipeline"]
