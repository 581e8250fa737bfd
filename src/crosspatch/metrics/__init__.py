# SPDX-License-Identifier: Apache-2.0
"""Numbers only: accuracy and its intervals, calibration, per-class tables."""
