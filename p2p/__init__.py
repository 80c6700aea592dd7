"""Training without a server: peers that meet, average and carry each other on."""
