# SPDX-License-Identifier: Apache-2.0
"""The command line: one verb is one file that parses, calls and prints."""
