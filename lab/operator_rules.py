"""Writes the rules of Prometheus for its Kubernetes operator: `python -m lab.operator_rules`."""

from lab.running import ROOT

SOURCE = ROOT / "deploy/prometheus/gserver.rules.yml"
FILE = ROOT / "deploy/kubernetes/monitoring/rules.yaml"
HEAD = """\
# The rules of deploy/prometheus/gserver.rules.yml for the Prometheus operator. That file has the
# comments. After a change there: python -m lab.operator_rules
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: gserver
  labels:
    app.kubernetes.io/name: gserver
spec:
"""


def rendered() -> str:
    """Return the file: the rules without their comments."""
    lines = SOURCE.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return HEAD + "".join(f"  {line}" for line in kept)


if __name__ == "__main__":
    FILE.write_text(rendered())
