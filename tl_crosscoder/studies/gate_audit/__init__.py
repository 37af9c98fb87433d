"""Gate audit: is what a gate on latents lets through about the tuned model, about any difference, or about nothing?"""

from tl_crosscoder.studies.gate_audit.audit import gate_audit
from tl_crosscoder.studies.gate_audit.gates import Gate
from tl_crosscoder.studies.gate_audit.result import AuditResult
from tl_crosscoder.studies.gate_audit.tasks import BehaviourTask, ExactMatch, Task, Unchanged

__all__ = ["AuditResult", "BehaviourTask", "ExactMatch", "Gate", "Task", "Unchanged", "gate_audit"]
