"""The model class that ships inside every converted folder; importing this package loads nothing heavy."""
