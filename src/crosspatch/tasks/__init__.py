# SPDX-License-Identifier: Apache-2.0
"""Tasks: what the labels mean. A task owns targets, loss, metrics and the predictions table."""
