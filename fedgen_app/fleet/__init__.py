"""A fleet of real devices: keys, certificates, services and backbones for a SuperLink and its SuperNodes."""
