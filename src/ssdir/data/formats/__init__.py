"""Annotation formats: COCO and YOLO."""
