# SPDX-License-Identifier: Apache-2.0
from .pipeline_dyna_unet import DynaUNetPipeline


__all__ = ["DynaUNetPipeline"]
