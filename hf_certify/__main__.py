"""``python -m hf_certify`` is ``hf-certify``, also under ``accelerate launch -m``."""

from hf_certify.cli import app

if __name__ == "__main__":
    app(prog_name="hf-certify")
