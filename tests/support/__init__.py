"""What several tests share: stand-ins for remote services, contracts, small inputs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
