# SPDX-License-Identifier: Apache-2.0
"""A run becomes as small and as fast as a budget asks: candidates are built, judged and timed on
this machine, and the best inside the budget is written as a bundle."""
