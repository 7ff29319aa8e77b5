"""The checkpoint registry: the only place where stages meet.

Reading it imports neither torch nor transformers; hashing imports blake3 when the first hash is needed.
"""

from stages.registry.integrity import Problem
from stages.registry.lineage import LineageNode
from stages.registry.manifest import Checkpoint, Parent
from stages.registry.registry import Registry

__all__ = ["Checkpoint", "LineageNode", "Parent", "Problem", "Registry"]
