# SPDX-License-Identifier: Apache-2.0
from .unet_dyna_2d import DynaUNet2DModel


__all__ = ["DynaUNet2DModel"]
