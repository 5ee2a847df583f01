"""What pipelines.export is made of: verification, the model card, upload."""
