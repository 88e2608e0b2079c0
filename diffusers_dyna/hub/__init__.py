# SPDX-License-Identifier: Apache-2.0
from .model_card import create_model_card
from .publishing import PublishedPipeline, check_can_publish, publish


__all__ = ["PublishedPipeline", "check_can_publish", "create_model_card", "publish"]
