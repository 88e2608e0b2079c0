# SPDX-License-Identifier: Apache-2.0
from .scheduling_flow_match import (
    FlowMatchODEScheduler,
    FlowMatchODESchedulerOutput,
    FlowMatchPath,
    FlowMatchPathCoefficients,
    FlowMatchSDEScheduler,
    FlowMatchSDESchedulerOutput,
)


__all__ = [
    "FlowMatchODEScheduler",
    "FlowMatchODESchedulerOutput",
    "FlowMatchPath",
    "FlowMatchPathCoefficients",
    "FlowMatchSDEScheduler",
    "FlowMatchSDESchedulerOutput",
]
