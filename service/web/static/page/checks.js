// What each check of the certificate says when it passes. docs/failures.md has the classes.
export const CHECKS = {
  F1: "Every parameter has its values",
  F2: "Every buffer has its values",
  F3: "Buffers hold what their class computes",
  F4: "The loader's globals are as they were",
  F7: "Inputs go to the device that reads them",
  F8: "Tied weights are together",
  F12: "Nothing is offloaded that was not asked for",
  F13: "What should be quantised is",
  F14: "Quantised layers can run here",
  F15: "The checkpoint had every tensor, and no other",
  F16: "Values are those of the checkpoint",
  strategy: "The strategy's own check",
  inputs: "The strategy places inputs",
  forward: "One forward, traced: every operator has what it reads, and the result is finite",
};
