"""What happens on one model: the backbone, its adapter, the training loop."""

import logging

# PEFT imports bitsandbytes where it is installed. That asks for a package which would fetch compiled code, and says in
# every step of every layer that 8 bits pass through float16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
