"""FedGen-Edge: federated LoRA adaptation of generative models, as one Flower application."""
