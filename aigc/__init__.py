"From raw text to a quantized, fine-tuned language model behind an endpoint"
__version__ = "0.1.0"
