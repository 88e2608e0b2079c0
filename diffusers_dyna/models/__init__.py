# SPDX-License-Identifier: Apache-2.0
from .transformer_dyna_dit import DYNA_DIT_CONFIGS, DynaDiTTransformer2DModel
from .unet_dyna_2d import DynaUNet2DModel


__all__ = ["DYNA_DIT_CONFIGS", "DynaDiTTransformer2DModel", "DynaUNet2DModel"]
