# SPDX-License-Identifier: Apache-2.0
"""What a network does with one picture: functions and figures."""
