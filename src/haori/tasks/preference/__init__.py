"""Preference learning: DPO, IPO, hinge, ORPO, SimPO and KTO over answers that people prefer to others."""
