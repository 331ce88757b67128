"""`python -m ldm sweep`: the best guidance and average of a checkpoint, found on a grid."""
