# SPDX-License-Identifier: Apache-2.0
"""Training: the recipe, the plan, the one loop, its state, evaluation and the run folder."""
