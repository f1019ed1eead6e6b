"""FedGen-Edge (arXiv 2511.11585): clients train A and B of LoRA, the server averages A and B weighted by examples.

After the last round every client fine-tunes the global adapter on its own data and keeps the result.
"""

from __future__ import annotations

from fedgen_app.federation.method import Method

METHOD = Method()
