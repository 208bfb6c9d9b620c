"""A stand-in for the Hugging Face Hub that the real `huggingface_hub` client talks to."""

from support.hub.faults import Fault
from support.hub.quotas import Quota
from support.hub.repository import Repository
from support.hub.server import Hub

__all__ = ["Fault", "Hub", "Quota", "Repository"]
