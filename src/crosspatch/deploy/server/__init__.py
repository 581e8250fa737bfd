# SPDX-License-Identifier: Apache-2.0
"""A bundle behind HTTP: pictures in, answers out. Nothing here imports torch.

service    one bundle: admission, deadlines, decoding, batches, draining; knows nothing of HTTP
decoder    the process that decodes pictures, with limits on its memory and time
workers    the decoding processes as seen from the server: asked, watched, replaced
batching   the thread that runs the engine on what is there
refusals   why an ask gets no answer: codes, statuses, words
"""
