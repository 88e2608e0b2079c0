# SPDX-License-Identifier: Apache-2.0
from .convert_dit import convert_diffusers_dit, convert_dit_checkpoint, sort_by_importance


__all__ = ["convert_diffusers_dit", "convert_dit_checkpoint", "sort_by_importance"]
