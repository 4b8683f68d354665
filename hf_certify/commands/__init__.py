"""The commands of ``hf-certify``, in groups; ``hf_certify.cli`` puts them together."""
