# SPDX-License-Identifier: Apache-2.0
"""What two or more models share: token state, attention, blocks, embeddings, position tables,
resizing."""
