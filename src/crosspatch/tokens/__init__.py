# SPDX-License-Identifier: Apache-2.0
"""Token reduction: one paper, one file. Each offers a `Reducer` of hooks over an explicit
`TokenState`, for the trunk ViT and for each branch of CrossViT."""
