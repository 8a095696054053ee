"""How images become batches: sources, reading, transforms, samplers, prefetching, batch augmentation."""
