# SPDX-License-Identifier: Apache-2.0
"""The pieces that training scripts compose: data, objective, randomness, checkpoints and the loop's helpers."""
