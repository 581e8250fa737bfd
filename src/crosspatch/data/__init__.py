# SPDX-License-Identifier: Apache-2.0
"""Data: from files to batches. Nothing is imported here, so that decoding stays free of torch.

decode      one picture: bytes -> upright 8-bit RGB; the only image opener
preprocess  how every picture becomes one size, in training and ever after
sources     a folder, an archive, a table or the embedded digits -> classes and items
tables      what the columns of a table mean; rows: the dialects of table files
labels      several labels to a picture: in cells of tables, by copies in class folders
groups      which pictures belong together, so that no split tears them apart
copies      exact copies among the files
trees       where a source's files lie: folder, zip, tar (in place, nothing is extracted)
split       train, val and test: by folders, or seeded and stratified
prepare     decode everything once: find the unreadable, fill the shared buffer
augment     batched augmentation, a pure function of (seed, epoch, position)
loading     batches in an order that depends on seed and epoch alone
"""
