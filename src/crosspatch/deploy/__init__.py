# SPDX-License-Identifier: Apache-2.0
"""Out of the training script: one file that holds the network, its preprocessing and its classes.

bundle     what a bundle says of itself, and the reading of it; no torch
graph      the network with everything around it: uint8 pixels in, calibrated probabilities out
export     a run -> one ONNX file, an OpenVINO pair, a torch.export archive
quantise   int8 of the products by a constant, dynamic or with static scales
place      where a bundle is written: aside first, renamed when whole
engines    ONNX Runtime and OpenVINO behind one call; no torch
choice     which engine and how many threads: a short measurement, remembered; no torch
predictor  files, bytes and arrays in, answers out; no torch
batch      very many pictures to one table; parts and table are where they lie and their rows
torch_engine, loading   a run folder or a bundle -> Predictor (`crosspatch.load`)
server     a bundle behind HTTP: decoding in processes, bounded queue, batches; no torch
client     the tiny client that is written beside a bundle: numpy, onnxruntime and Pillow only
verify     a bundle against the torch model, on the user's own pictures
bench      engine x precision x batch x threads on this machine; subject, peak and bench_report
           are what is measured, what it is set against, and how it is told
"""
