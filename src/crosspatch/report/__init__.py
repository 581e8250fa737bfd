# SPDX-License-Identifier: Apache-2.0
"""Pages and cards that people read: the audit, the report of a run, the model card."""
