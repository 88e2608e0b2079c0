# SPDX-License-Identifier: Apache-2.0
from .flow_integration import FlowIntegrationOutput, FlowLikelihoodOutput, flow_log_likelihood, integrate_flow
from .scheduling_flow_match import (
    FlowMatchODEScheduler,
    FlowMatchODESchedulerOutput,
    FlowMatchPath,
    FlowMatchPathCoefficients,
    FlowMatchSDEScheduler,
    FlowMatchSDESchedulerOutput,
)


__all__ = [
    "FlowIntegrationOutput",
    "FlowLikelihoodOutput",
    "FlowMatchODEScheduler",
    "FlowMatchODESchedulerOutput",
    "FlowMatchPath",
    "FlowMatchPathCoefficients",
    "FlowMatchSDEScheduler",
    "FlowMatchSDESchedulerOutput",
    "flow_log_likelihood",
    "integrate_flow",
]
