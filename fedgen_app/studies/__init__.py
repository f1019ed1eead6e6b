"""The studies of the papers, as sweep files, and the steps that prepare their backbones."""
