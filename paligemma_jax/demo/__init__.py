"""The synthetic world of shapes and words that the bundled demo model is trained on."""
