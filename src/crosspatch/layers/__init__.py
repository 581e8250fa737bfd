"""What two or more models share: token state, attention, blocks, embeddings, position tables,
resizing."""
