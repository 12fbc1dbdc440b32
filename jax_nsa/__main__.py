"""`python -m jax_nsa`: what this machine can run, and whether it computes the right thing."""

import sys

from jax_nsa import doctor

if __name__ == "__main__":
    sys.exit(doctor.main())
